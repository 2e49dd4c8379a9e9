from __future__ import annotations

import pytest
import torch

from kdrun.data.augment import Augmentation
from kdrun.data.bundled import bundled_table
from kdrun.data.digits import Digits
from kdrun.data.tabular import Tabular
from kdrun.errors import UserError


@pytest.fixture
def digits() -> Digits:
    module = Digits()
    module.prepare("holdout")
    return module


def test_sizes_and_shapes(digits):
    assert (digits.train_size, digits.validation_size, digits.test_size) == (1102, 195, 500)
    assert digits.num_classes == 10 and digits.input_shape == (1, 8, 8)
    assert digits.class_names == list("0123456789") and digits.task == "classification"


def test_inputs_are_standardised_and_equal_sklearns(digits):
    from sklearn.datasets import load_digits

    batches = [*digits.train(batch_size=512, seed=0, device="cpu")]
    inputs = torch.cat([batch.inputs for batch in batches])
    index = torch.cat([batch.index for batch in batches])
    target = torch.cat([batch.target for batch in batches])
    assert abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02
    original = load_digits()
    expected = (torch.from_numpy(original.images).float()[index] - 4.88) / 6.02
    assert torch.allclose(inputs[:, 0], expected, atol=1e-5)
    assert torch.equal(target, torch.from_numpy(original.target)[index])


def test_splits_are_disjoint_stratified_and_fixed(digits):
    def index(loader):
        return torch.cat([batch.index for batch in loader])

    parts = [
        index(digits.train(batch_size=100, seed=1, device="cpu")),
        index(digits.validation(batch_size=100, device="cpu")),
        index(digits.test(batch_size=100, device="cpu")),
    ]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    again = Digits()
    again.prepare("holdout")
    assert torch.equal(parts[2], index(again.test(batch_size=100, device="cpu")))
    target = torch.cat([batch.target for batch in digits.test(batch_size=500, device="cpu")])
    assert torch.bincount(target).tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]


def test_paper_protocol_validates_on_test():
    module = Digits()
    module.prepare("paper")
    assert (module.train_size, module.validation_size) == (1297, 500)
    validation = torch.cat([b.index for b in module.validation(batch_size=64, device="cpu")])
    test = torch.cat([b.index for b in module.test(batch_size=64, device="cpu")])
    assert torch.equal(validation, test)


def test_fingerprint_names_content_splits_and_preprocessing(digits):
    def fingerprint(protocol="holdout", **options):
        module = Digits(**options)
        module.prepare(protocol)
        return module.fingerprint

    variants = [
        fingerprint(),
        fingerprint("paper"),
        fingerprint(val_fraction=0.2),
        fingerprint(image_size=16),
        fingerprint(augmentation=Augmentation(crop_padding=1)),
    ]
    assert len(set(variants)) == len(variants)
    assert digits.fingerprint == variants[0]
    with pytest.raises(RuntimeError, match="prepare"):
        _ = Digits().fingerprint


def test_image_size():
    module = Digits(image_size=32)
    module.prepare("holdout")
    assert module.input_shape == (1, 32, 32)
    assert next(iter(module.test(batch_size=4, device="cpu"))).inputs.shape == (4, 1, 32, 32)


def test_a_view_that_is_not_there(digits):
    with pytest.raises(UserError, match="no 'strong', which the method needs: none"):
        digits.train(batch_size=4, seed=0, device="cpu", views=("strong",))


def test_an_empty_validation_split_is_refused():
    with pytest.raises(UserError, match="validation split is empty"):
        Digits(val_fraction=0.0).prepare("holdout")


@pytest.mark.parametrize(
    ("name", "width", "classes", "rows"),
    [("wine", 13, 3, 178), ("breast_cancer", 30, 2, 569), ("iris", 4, 3, 150)],
)
def test_tables(name, width, classes, rows):
    module = Tabular(name=name)
    module.prepare("holdout")
    assert module.input_shape == (width,) and module.num_classes == classes
    assert module.train_size + module.validation_size + module.test_size == rows
    inputs = torch.cat([b.inputs for b in module.train(batch_size=64, seed=0, device="cpu")])
    assert (inputs.mean(0).abs() < 0.2).all() and (inputs.std(0) - 1).abs().max() < 0.3


def test_a_table_that_is_not_there():
    with pytest.raises(UserError, match="this version of scikit-learn has no"):
        bundled_table("nothing.csv")


def test_few_shot_and_inputs_within_the_unit_interval(digits):
    module = Digits(per_class=30, scale="unit")
    module.prepare("holdout")
    assert (module.train_size, module.validation_size, module.test_size) == (300, 195, 500)
    batch = next(iter(module.train(batch_size=300, seed=0, device="cpu")))
    assert batch.target.bincount().tolist() == [30] * 10
    assert (batch.inputs.min(), batch.inputs.max()) == (0, pytest.approx(1))
    assert module.fingerprint != digits.fingerprint
    with pytest.raises(UserError, match=r"dataset\.per_class=400: class 8 has"):
        Digits(per_class=400).prepare("holdout")
