"""A page to try a trained network: drop a photo, see its mask and its cut-out.

    python tools/app.py                     then open the address that it prints
    python tools/app.py --checkpoint FILE

The page is served to this machine alone, and photos do not leave it.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import support.startup  # noqa: E402, F401

# isort: split

from predict import Predictor  # noqa: E402
from support.command_line import Parser, arguments, run_script  # noqa: E402
from support.errors import BadInput  # noqa: E402
from support.pictures import draw  # noqa: E402

TITLE = "Cut an object out of a photo"


def get_args_parser():
    """The flags of app.py."""
    parser = Parser(prog="app.py", description="A local page to try a trained network.")
    which = "of train.py or tools/export.py (default: the same as predict.py's)"
    parser.add_argument("--checkpoint", metavar="FILE", help=which)
    return parser


class Answers:
    """What the page does with a photo; `gr` is the module gradio."""

    def __init__(self, gr, predictor):
        self.gr = gr
        self.predictor = predictor

    def warn(self, problem):
        """Show the message about a bad photo, without the folder that Gradio keeps it in."""
        message = str(BadInput(Path(problem.path).name, problem.reason, problem.remedy))
        self.gr.Warning(message, title="This photo cannot be used")

    def ask(self, photo):
        """The page's state: (the photo's path, its logits (K, h, w)), or None without a photo."""
        if not photo:
            return None
        try:
            return photo, self.predictor.logits([self.predictor.read(photo)])[0]
        except BadInput as problem:
            self.warn(problem)
            return None

    def show(self, state, threshold):
        """(mask, cut-out, a download of each) of the page's state; pictures are paths of files,
        which Gradio removes after an hour."""
        no_download = self.gr.DownloadButton(value=None, interactive=False)
        if state is None:
            return None, None, no_download, no_download
        photo, logits = state
        stem = f"{Path(photo).with_suffix('')}_{threshold}"
        paths = {"mask": f"{stem}_mask.png", "cutout": f"{stem}_cutout.png"}
        try:
            draw(photo, logits, paths, threshold)
        except BadInput as problem:
            self.warn(problem)
            return None, None, no_download, no_download
        downloads = [self.gr.DownloadButton(value=p, interactive=True) for p in paths.values()]
        return *paths.values(), *downloads


def make_page(gr, predictor):
    """The page, as Blocks of the module gradio."""
    answers = Answers(gr, predictor)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{predictor.filename}, on this machine: photos do not leave it.")
        with gr.Row():
            photo = gr.File(label="Photo", type="filepath", height=160, scale=2)
            with gr.Column():
                threshold = gr.Slider(0.01, 0.99, predictor.threshold, step=0.01, label="Threshold")
                with gr.Row():
                    mask_file = gr.DownloadButton("Mask as PNG", interactive=False)
                    cutout_file = gr.DownloadButton("Cut-out as PNG", interactive=False)
        with gr.Row():
            looks = {"interactive": False, "buttons": ["fullscreen"]}
            mask = gr.Image(label="Mask", elem_id="mask", **looks)
            cutout = gr.Image(label="Cut-out", elem_id="cutout", **looks)
        state = gr.State()
        outputs = [mask, cutout, mask_file, cutout_file]
        photo.change(answers.ask, photo, state).then(answers.show, [state, threshold], outputs)
        threshold.release(answers.show, [state, threshold], outputs)
    return page


def main(argv=None):
    """Serve the page until Ctrl-C; return the exit code."""
    args = get_args_parser().parse_args(arguments(argv))
    predictor = Predictor(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        # Set before gradio is imported: photos go into a folder that is removed, and gradio does
        # not contact its makers.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr
        except ImportError:
            raise BadInput("app.py", "needs another package", "pip install gradio") from None
        page = make_page(gr, predictor)
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            share=False,
            max_file_size="50mb",
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
