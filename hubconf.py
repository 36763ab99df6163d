"""torch.hub's entries: https://pytorch.org/docs/stable/hub.html

    model = torch.hub.load(REPO, "unet_carvana", pretrained=True)    # an nn.Module
    predictor = torch.hub.load(REPO, "predictor")                    # photos' files in, masks out

REPO is this repository's `owner/name` on GitHub, or, with source="local", the folder of a clone.
"""

import contextlib
import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "albumentations", "cv2", "PIL", "numpy", "tqdm"]

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def own_modules():
    """Import this repository's files here, whatever else is called `utils` or `model` elsewhere.

    Afterwards those names mean again what they meant to the caller before.
    """
    names = {path.stem for path in HERE.glob("*.py")}
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    for name, module in before.items():
        if Path(getattr(module, "__file__", None) or ".").resolve().parent != HERE:
            del sys.modules[name]
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path.remove(str(HERE))
        for name in names - set(before):
            sys.modules.pop(name, None)
        sys.modules.update(before)


def unet_carvana(pretrained=True, **kwargs):
    """A UNet in evaluation mode.

    Args:
        pretrained: the weights that ship (see weights/README.md), with their features; otherwise
            random ones.
        **kwargs: arguments of UNet, for pretrained=False.

    Shape: (N, 3, H, W), RGB from 0 to 1, best of 320x480 -> (N, 1, H, W), logits.
    """
    with own_modules():
        from checkpoints import SHIPPED, build_model, load_checkpoint
        from model import UNet

        if not pretrained:
            return UNet(**kwargs).eval()
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: the pretrained network has its own: leave out")
        return build_model(load_checkpoint(HERE / SHIPPED), SHIPPED, "cpu")


def predictor(checkpoint=None, **kwargs):
    """A Predictor: `mask(path)` and `probabilities(path)` take a photo's file. See predictor.py.

    Args:
        checkpoint: a file of train.py or export.py; None for the weights that ship.
        **kwargs: `device`, `height`, `width`, `tta`, as Predictor has them.
    """
    with own_modules():
        from checkpoints import SHIPPED
        from predictor import Predictor

        return Predictor(checkpoint or HERE / SHIPPED, **kwargs)
