"""Combinations that cannot work are refused before anything runs, with the option to change."""

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.errors import ConfigErrors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["training.scheduler.name=multistep"],
            "training.scheduler.milestones: multistep needs at least one epoch",
        ),
        (
            [
                "training.scheduler.name=multistep",
                "training.epochs=5",
                "training.scheduler.milestones=[3,5]",
            ],
            "training.scheduler.milestones: [5] lie beyond the last of 5 epochs; "
            "set training.epochs above 5",
        ),
        (
            ["training.scheduler.name=multistep", "training.scheduler.milestones=[3,2]"],
            "training.scheduler.milestones: must rise",
        ),
        (
            ["training.epochs=2", "training.scheduler.warmup_epochs=2"],
            "training.scheduler.warmup_epochs: 2 leaves nothing of 2 epochs",
        ),
        (
            ["training.scheduler.name=cosine", "training.scheduler.min_lr=1"],
            "training.scheduler.min_lr: 1 is above training.optimizer.lr",
        ),
        (
            ["trainer=ddp", "trainer.devices=3"],
            "training.batch_size: 64 cannot be divided among 3 processes",
        ),
        (["trainer.accumulate=3"], "trainer.accumulate: 3 does not divide the 64 samples"),
        (
            ["trainer=ddp", "trainer.accumulate=64"],
            "trainer.accumulate: 64 does not divide the 32 samples of a process",
        ),
        (["trainer.strategy=fsdp"], "trainer.strategy: fsdp divides networks"),
        (["trainer.accelerator=mps", "trainer.devices=2"], "trainer.devices: an mps machine"),
        (["teacher.finetune=true"], "teacher.finetune: there are no weights to start from"),
        (
            ["teacher.cache=logits", "teacher.mode=batch_stats"],
            "teacher.cache: with teacher.mode=batch_stats the teacher's outputs depend on",
        ),
        (
            ["teacher.cache=topk", "teacher.cache_views=9", "training.epochs=3"],
            "teacher.cache_views: 3 epochs cannot use 9 augmentations",
        ),
        (
            ["teacher.cache=logits", "dataset.mix.cutmix=1.0"],
            "teacher.cache: mixed images have no recorded outputs; set dataset.mix.mixup=0 and",
        ),
        (
            ["teacher.cache=logits", "dataset=digits_few_shot", "dataset.data.mix.mixup=0.2"],
            "teacher.cache: mixed images have no recorded outputs; set dataset.data.mix.mixup=0",
        ),
        (
            ["training.teacher.batch_size=63", "trainer=ddp"],
            "training.teacher.batch_size: 63 cannot be divided among 2 processes",
        ),
    ],
)
def test_refused_with_the_option_to_change(words, said):
    with pytest.raises(ConfigErrors) as refused:
        compose(words, open_catalogue())
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(said)


def test_milestones_of_the_teacher_are_held_against_its_own_epochs():
    words = [
        "training.scheduler.name=multistep",
        "training.scheduler.milestones=[3,4]",
        "training.epochs=5",
        "training.teacher.epochs=4",
    ]
    with pytest.raises(ConfigErrors) as refused:
        compose(words, open_catalogue())
    assert "set training.teacher.epochs above 4" in refused.value.problems[0]


def test_what_works_is_not_refused():
    compose(["trainer=ddp", "trainer.devices=4", "trainer.accumulate=2"], open_catalogue())
    compose(["teacher.finetune=true", "teacher.checkpoint=w.safetensors"], open_catalogue())
