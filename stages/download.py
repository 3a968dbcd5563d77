"""Get the images: data.sources of params.yaml → data/."""

from stages import Params, run


def download(params: Params) -> None:
    """Write the images as uint8 arrays, with labels, class names and a digest."""
    from cifarlab import files
    from cifarlab.data.readers import prepare

    data = prepare(params.data, files.root(), files.cache(), files.DATA)
    train, test = len(data.labels["train"]), len(data.labels["test"])
    print(f"{data.name}: {train:,} training and {test:,} test images, {len(data.classes)} classes")


if __name__ == "__main__":
    run(download)
