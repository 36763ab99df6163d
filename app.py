"""A page to try a trained network: drop a photo, see its mask and the object cut out.

    python app.py                           then open the address that it prints
    python app.py --checkpoint FILE

The page is served to this machine alone, and photos do not leave it.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import: it would call home

from PIL import Image

from command_line import Parser, run_script
from files import BadInput, photo_size, read_photo, shown
from pictures import colour_profile, cut_out, save_mask
from predictor import Predictor, binary_mask, scale
from utils import save_picture

MAX_UPLOAD = "50mb"
LARGEST = 50_000_000  # of a photo here; predict.py takes larger ones
TITLE = "Cut an object out of a photo"


def get_args_parser():
    parser = Parser(prog="app.py", description="A local page to try a trained network.")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="of train.py or export.py; without, the same as predict.py's",
    )
    return parser


def make_page(predictor, folder):
    """The page, as Gradio's Blocks; results are written into `folder`. Raises BadInput."""
    try:
        import gradio as gr
    except ImportError:
        raise BadInput("app.py: needs a package more: pip install gradio") from None

    def place_of(request):
        """A session's folder. Its name comes from outside, so the folder has another."""
        return Path(folder) / hashlib.sha256(request.session_hash.encode()).hexdigest()

    def forget(request: gr.Request):
        """Remove a session's results; Gradio has copies of what it shows."""
        shutil.rmtree(place_of(request), ignore_errors=True)

    def refuse(problem, photo):
        """A bad photo's line, as on the shell but for the folder."""
        line = str(problem).replace(photo, Path(photo).name)
        return gr.Error(line, title="This photo cannot be used", print_exception=False)

    def show(answer, threshold, request: gr.Request):
        """Mask and cut-out, as pictures and as files: what the four outputs below show."""
        if answer is None:
            return None, None, *[gr.DownloadButton(value=None, interactive=False)] * 2
        photo, logits = answer
        forget(request)
        place = place_of(request)
        mask, cutout = (place / f"{Path(photo).stem}_{kind}.png" for kind in ("mask", "cutout"))
        try:
            logits = scale(logits, photo_size(photo))
            save_mask(binary_mask(logits, threshold), mask)
            picture = cut_out(Image.fromarray(read_photo(photo)), logits, threshold)
            save_picture(picture, cutout, compress_level=1, icc_profile=colour_profile(photo))
        except BadInput as problem:  # uploads are kept for an hour
            raise refuse(problem, photo) from None
        files = [gr.DownloadButton(value=str(path), interactive=True) for path in (mask, cutout)]
        return str(mask), str(cutout), *files

    def answer_photo(photo):
        """The photo's path and the network's logits."""
        if photo is None:
            return None
        try:
            return photo, answer(predictor, photo)
        except BadInput as problem:
            raise refuse(problem, photo) from None

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{predictor.filename}, on this machine: photos do not leave it.")
        with gr.Row():
            photo = gr.File(label="Photo", type="filepath", height=160, scale=2)
            with gr.Column():
                threshold = gr.Slider(
                    0.01, 0.99, predictor.threshold, step=0.01, label="Threshold: object above"
                )
                with gr.Row():
                    mask_file = gr.DownloadButton("Mask as PNG", interactive=False)
                    cutout_file = gr.DownloadButton("Cut-out as PNG", interactive=False)
        with gr.Row():
            looks = {"interactive": False, "buttons": ["fullscreen"]}
            mask = gr.Image(label="Mask", elem_id="mask", **looks)
            cutout = gr.Image(label="Cut-out", elem_id="cutout", **looks)
        state = gr.State()
        shown = {"fn": show, "inputs": [state, threshold]}
        shown["outputs"] = [mask, cutout, mask_file, cutout_file]
        answered = photo.change(answer_photo, photo, state)
        answered.success(**shown)
        answered.failure(lambda: None, None, state).then(**shown)
        threshold.release(**shown)
        page.unload(forget)
    return page


def answer(predictor, photo):
    """The network's logits of a photo, at the network's size. Raises BadInput."""
    height, width = photo_size(photo)
    if height * width > LARGEST:
        raise BadInput(
            f"{shown(photo)}: {width}x{height} is more than {LARGEST // 10**6} megapixels: "
            "use predict.py"
        )
    return predictor.logits([predictor.read(photo)])[0]


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    predictor = Predictor(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        page = make_page(predictor, folder)
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            share=False,
            max_file_size=MAX_UPLOAD,
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"Open {address} in a browser; Ctrl-C here ends it", flush=True)
        page.block_thread()
    return 0


if __name__ == "__main__":
    run_script(main)
