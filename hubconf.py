"""torch.hub's entries: https://pytorch.org/docs/stable/hub.html

    model = torch.hub.load(REPO, "unet_carvana", pretrained=True)    # an nn.Module
    predictor = torch.hub.load(REPO, "predictor")                    # photos' files in, masks out

REPO is this repository's `owner/name` on GitHub, or, with source="local", the folder of a clone.
"""

import importlib
import sys
from pathlib import Path

dependencies = ["torch", "albumentations", "cv2", "PIL", "numpy", "tqdm"]
HERE = Path(__file__).resolve().parent
NAMES = {"predict", "utils", "dataset", "model", "support"}


def import_predict():
    """predict.py of this repository. It and all that it imports are called unet_carvana_predict and
    so on afterwards: models can be pickled, and the caller's `utils` or `model` are as before."""
    done = sys.modules.get("unet_carvana_predict")
    if done and Path(done.__file__).parent == HERE:
        return done
    callers = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in NAMES
    }
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("predict")
    finally:
        sys.path.remove(str(HERE))
        for name in [n for n in sys.modules if n.partition(".")[0] in NAMES]:
            alias, module = f"unet_carvana_{name.replace('.', '_')}", sys.modules.pop(name)
            sys.modules[alias] = module
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == name:
                    value.__module__ = alias
        sys.modules.update(callers)


def unet_carvana(pretrained=True, **kwargs):
    """A UNet in evaluation mode: pretrained, or with random weights and these arguments of UNet.

    Shape: (N, 3, H, W), RGB from 0 to 1, best of 640x960 -> (N, 1, H, W), logits.
    """
    utils = import_predict().utils
    if not pretrained:
        return utils.UNet(**kwargs).eval()
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: the pretrained network has its own: leave out")
    return utils.build_model(utils.load_checkpoint(utils.SHIPPED))


def predictor(checkpoint=None, **kwargs):
    """A Predictor of a checkpoint (None: the weights that ship), with arguments as in predict.py:
    `mask(path)` and `probabilities(path)` take a photo's file."""
    predict = import_predict()
    return predict.Predictor(checkpoint or predict.utils.SHIPPED, **kwargs)
