"""Entry points for torch.hub: https://pytorch.org/docs/stable/hub.html

    model = torch.hub.load(REPO, "unet_carvana", pretrained=True)    # an nn.Module
    predictor = torch.hub.load(REPO, "predictor")                    # photos in, masks out

REPO is this repository's `owner/name` on GitHub, or, with source="local", the folder of a clone.
"""

import importlib
import sys
from pathlib import Path

dependencies = ["torch", "albumentations", "cv2", "PIL", "numpy", "tqdm"]
HERE = Path(__file__).resolve().parent
NAMES = {"predict", "utils", "dataset", "model", "support"}


def import_predict():
    """The module predict of this repository. It and the modules that it imports are renamed to
    unet_carvana_predict and so on: models can be pickled, and the caller's own `utils` or `model`
    stay as they are."""
    imported_before = sys.modules.get("unet_carvana_predict")
    if imported_before and Path(imported_before.__file__).parent == HERE:
        return imported_before
    callers_modules = {name: sys.modules.pop(name) for name in names_of_ours()}
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("predict")
    finally:
        sys.path.remove(str(HERE))
        for name in names_of_ours():
            rename_module(name, f"unet_carvana_{name.replace('.', '_')}")
        sys.modules.update(callers_modules)


def names_of_ours():
    """Names of imported modules that are, or sound like, this repository's."""
    return [name for name in sys.modules if name.partition(".")[0] in NAMES]


def rename_module(name, new_name):
    """Rename an imported module, for its classes as well, which pickle finds by it."""
    module = sys.modules.pop(name)
    sys.modules[new_name] = module
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == name:
            value.__module__ = new_name


def unet_carvana(pretrained=True, **kwargs):
    """A UNet in evaluation mode: pretrained, or with random weights and `kwargs` as its arguments.

    Shape: images (N, 3, H, W), float32, RGB from 0 to 1, best at 640x960 -> logits (N, 1, H, W).
    Raises ValueError for `kwargs` beside pretrained.
    """
    utils = import_predict().utils
    if not pretrained:
        return utils.UNet(**kwargs).eval()
    if kwargs:
        reason = "the pretrained network has its own: leave them out, or use pretrained=False"
        raise ValueError(f"{', '.join(kwargs)}: {reason}")
    return utils.build_model(utils.load_checkpoint(utils.SHIPPED))


def predictor(checkpoint=None, **kwargs):
    """A Predictor (see predict.py, also for `kwargs`) of a checkpoint, by default of the weights
    that ship; its `mask`, `masks`, `cutout` and `probabilities` take photos as files, bytes, PIL
    images or arrays."""
    predict = import_predict()
    return predict.Predictor(checkpoint or predict.utils.SHIPPED, **kwargs)
