"""A page to try a trained network: drop a photo, see its mask and the object cut out.

    python tools/app.py                     then open the address that it prints
    python tools/app.py --checkpoint FILE

The page is served to this machine alone, and photos do not leave it.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
from predict import Predictor, draw  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from support.errors import BadInput  # noqa: E402

TITLE = "Cut an object out of a photo"


def get_args_parser():
    """The flags of app.py."""
    parser = Parser(prog="app.py", description="A local page to try a trained network.")
    which = "of train.py or tools/export.py (default: the same as predict.py's)"
    parser.add_argument("--checkpoint", metavar="FILE", help=which)
    return parser


def make_page(gr, predictor):
    """The page, as Blocks of the module gradio."""

    def warn(problem):
        """Show a bad photo's line, as on the shell but for the folder."""
        line = str(BadInput(Path(problem.path).name, problem.reason, problem.remedy))
        gr.Warning(line, title="This photo cannot be used")

    def answer(photo):
        """What the state holds: the photo's path and the network's logits, (K, h, w)."""
        try:
            return photo and (photo, predictor.logits([predictor.read(photo)])[0])
        except BadInput as problem:
            warn(problem)

    def show(state, threshold):
        """Mask and cut-out, as pictures and as files; Gradio removes those here after an hour."""
        try:
            if state:
                photo, logits = state
                name = f"{Path(photo).with_suffix('')}_{threshold}"
                paths = {kind: f"{name}_{kind}.png" for kind in ("mask", "cutout")}
                draw(photo, logits, paths, threshold)
                files = [gr.DownloadButton(value=p, interactive=True) for p in paths.values()]
                return *paths.values(), *files
        except BadInput as problem:
            warn(problem)
        return None, None, *[gr.DownloadButton(value=None, interactive=False)] * 2

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
        photo.change(answer, photo, state).then(show, [state, threshold], outputs)
        threshold.release(show, [state, threshold], outputs)
    return page


def main(argv=None):
    """Serve the page until Ctrl-C; returns the exit code."""
    args = get_args_parser().parse_args(argv)
    predictor = Predictor(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        # Before its import: photos into a folder that does not stay, and no calls home.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr
        except ImportError:
            raise BadInput("app.py", "needs a package more", "pip install gradio") from None
        page = make_page(gr, predictor)
        options = {"server_name": "127.0.0.1", "share": False, "max_file_size": "50mb"}
        options |= {"ssr_mode": False, "footer_links": [], "quiet": True}
        _, address, _ = page.launch(**options, prevent_thread_lock=True)
        print(f"Open {address} in a browser; Ctrl-C here ends it", flush=True)
        page.block_thread()
    return 0


if __name__ == "__main__":
    run_script(main)
