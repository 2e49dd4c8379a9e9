"""Image classifiers of timm, torchvision and transformers by name.

Each function returns the library's own module, unchanged but for the number of classes and of input
channels, so its state dict is the library's. A library is imported when its function is called.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from kdrun.errors import UserError
from kdrun.parameters import PositiveInt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUILD_ERRORS = (ValueError, TypeError, AssertionError, RuntimeError, KeyError, ArithmeticError)
"""What the libraries raise for options and image sizes that do not go together."""


def timm_model(
    *,
    name: str,
    pretrained: bool = False,
    num_classes: PositiveInt,
    in_channels: PositiveInt = 3,
    image_size: PositiveInt | None = None,
    options: dict | None = None,
) -> nn.Module:
    """A network of timm.

    Args:
        name: ``resnet18``, ``vit_tiny_patch16_224``, ``resnet50.a1_in1k``, ...
        pretrained: load timm's weights; the classifier is new where their classes differ.
        num_classes: outputs of the classifier.
        in_channels: channels of the images; timm folds pretrained first layers to fit.
        image_size: side of the images, for networks built for one size.
        options: further keywords of ``timm.create_model`` (``embed_dim``, ``patch_size``, ...).

    Raises:
        UserError: unknown name, options that do not fit, or weights that cannot be fetched.
    """
    import timm

    label = f"timm/{name}"
    if not timm.is_model(name):
        raise UserError(_unknown(label, name.partition(".")[0], timm.list_models()))
    keywords: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    given = timm.get_pretrained_cfg(name)
    if given is not None and given.fixed_input_size and image_size is not None:
        keywords["img_size"] = image_size
    overlay = (options or {}).get("pretrained_cfg_overlay") or {}
    classes = overlay.get("num_classes", given.num_classes if given is not None else num_classes)
    network = _build(
        label,
        lambda: timm.create_model(name, pretrained=pretrained, **keywords | (options or {})),
        fetches=pretrained,
    )
    if pretrained and classes != num_classes:
        _warn_new_classifier(label, classes, num_classes)
    if given is not None:
        expected = (overlay.get("mean", given.mean), overlay.get("std", given.std))
        network.input_normalisation = expected
    return network


def torchvision_model(
    *,
    name: str,
    pretrained: bool = False,
    num_classes: PositiveInt,
    in_channels: PositiveInt = 3,
    options: dict | None = None,
) -> nn.Module:
    """A network of torchvision.

    Args:
        name: ``resnet18``, ``swin_t``, ``convnext_tiny``, ...
        pretrained: load torchvision's best weights (``DEFAULT``); the classifier is new where their
            classes differ.
        num_classes: outputs of the classifier.
        in_channels: channels of the images; other than 3 only without pretrained weights, with a
            new first convolution.
        options: further keywords of the network's builder (``image_size`` of ViT, ...).

    Raises:
        UserError: unknown name, options that do not fit, weights that cannot be fetched, or
            pretrained weights for other channels.
    """
    from torchvision import models

    label = f"torchvision/{name}"
    if name not in models.list_models(module=models):
        raise UserError(_unknown(label, name, models.list_models(module=models)))
    keywords = dict(options or {})
    if pretrained and in_channels != 3:
        raise UserError(
            f"{label}: its pretrained weights read 3 channels but the images have {in_channels}; "
            "set pretrained=false"
        )
    if not pretrained:
        keywords["num_classes"] = num_classes
    network = _build(
        label,
        lambda: models.get_model(name, weights="DEFAULT" if pretrained else None, **keywords),
        fetches=pretrained,
    )
    if pretrained:
        classes = len(models.get_model_weights(name).DEFAULT.meta["categories"])
        if classes != num_classes:
            _replace_classifiers(network, classes, num_classes)
            _warn_new_classifier(label, classes, num_classes)
    if in_channels != 3:
        _replace_first_convolution(network, in_channels)
    expected = models.get_model_weights(name).DEFAULT.transforms()
    network.input_normalisation = expected.mean, expected.std
    return network


def hf_model(
    *,
    name: str | None = None,
    pretrained: bool = False,
    num_classes: PositiveInt,
    in_channels: PositiveInt = 3,
    image_size: PositiveInt | None = None,
    options: dict | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """An image classifier of transformers; its forward gives an object with ``logits``.

    Args:
        name: name on the hub, or a folder that ``save_pretrained`` has written. Null: a new network
            from ``options`` alone.
        pretrained: load its weights; otherwise only its configuration is read. The classifier is
            new where the classes differ.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: side of the images, for networks built for one size.
        options: entries that replace those of the configuration; without ``name`` they must say
            ``model_type`` (``vit``, ``resnet``, ``swin``, ...).
        trust_remote_code: run the Python code that comes with a hub repository.

    Raises:
        UserError: no such model, options that do not fit, or files that cannot be fetched.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    options = dict(options or {})
    label = f"hf/{name or options.get('model_type')}"
    if name is None and (pretrained or "model_type" not in options):
        raise UserError(
            "hf: give name (hub name or folder), or options.model_type of a new network"
        )

    def configured(**entries: Any) -> PretrainedConfig:
        if name is None:
            return AutoConfig.for_model(options["model_type"], **entries)
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **entries)

    given = _build(label, configured, fetches=name is not None)
    entries = {"num_labels": num_classes, "num_channels": in_channels}
    if image_size is not None:
        entries["image_size"] = image_size
    known = given.to_dict() | {"num_labels": given.num_labels}
    entries = {key: value for key, value in entries.items() if key in known} | options
    unknown = next((key for key in entries if key not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        raise UserError(f"{label}: no option {unknown}" + (f"; {near[0]}?" if near else ""))
    entries.pop("model_type", None)
    config = _build(label, lambda: configured(**entries), fetches=name is not None)
    classes = given.num_labels

    def build() -> nn.Module:
        if not pretrained:
            return AutoModelForImageClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
        return AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=classes != num_classes,
            trust_remote_code=trust_remote_code,
        )

    network = _build(label, build, fetches=pretrained)
    if pretrained and classes != num_classes:
        _warn_new_classifier(label, classes, num_classes)
    expected = None if name is None else hf_normalisation(name)
    if expected is not None:
        network.input_normalisation = expected
    return network


def hf_normalisation(name: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that a model of transformers normalises images with, in [0, 1].

    Args:
        name: on the hub, or a folder; None is returned where it has no image processor.
    """
    from transformers import ImageProcessingMixin

    try:
        processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):
        return None
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None:
        return None
    # A processor multiplies 8-bit values by this before it normalises.
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    largest = 255 * factor
    return [value / largest for value in mean], [value / largest for value in std]


def _build(label: str, builder: Callable[[], Any], *, fetches: bool) -> Any:
    """Call ``builder``; what it raises becomes one line that names the network."""
    try:
        return builder()
    except OSError as error:
        what = "files cannot be fetched or read" if fetches else "cannot be built"
        raise UserError(f"{label}: its {what} ({_line(error)})") from error
    except BUILD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{label} comes with Python code of its own, which is run only with "
                "trust_remote_code=true"
            ) from error
        raise UserError(f"{label} cannot be built: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _unknown(label: str, name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"no network {label}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _warn_new_classifier(label: str, pretrained_classes: int, num_classes: int) -> None:
    warnings.warn(
        f"{label}: its pretrained classifier has {pretrained_classes} classes, the data set "
        f"{num_classes}; the classifier starts untrained",
        stacklevel=3,
    )


def _replace_classifiers(network: nn.Module, classes: int, num_classes: int) -> None:
    """Put new layers in the place of those as wide as the old classes (auxiliary heads too)."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module.out_features == classes:
            _put(network, path, nn.Linear(module.in_features, num_classes))
        elif isinstance(module, nn.Conv2d) and module.out_channels == classes:
            _put(network, path, nn.Conv2d(module.in_channels, num_classes, 1))


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    path, first = next(
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    )
    replacement = nn.Conv2d(
        in_channels,
        first.out_channels,
        first.kernel_size,
        stride=first.stride,
        padding=first.padding,
        bias=first.bias is not None,
    )
    _put(network, path, replacement)


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
