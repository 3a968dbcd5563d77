"""Get the images: sources of params.yaml → data/."""

from pathlib import Path

from cifarlab.params import Params
from stages import run


def download(params: Params) -> None:
    """Write the images as uint8 arrays, with labels, class names and their digest."""
    from cifarlab import sources
    from cifarlab.files import root

    data = sources.prepare(params.data, root(), root() / ".cache")
    data.save(Path("data"))
    print(
        f"{data.name}: {len(data.labels['train']):,} training and {len(data.labels['test']):,} test images of {len(data.classes)} classes"
    )


if __name__ == "__main__":
    run(download)
