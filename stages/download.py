"""Get the images: data.sources of params.yaml → data/."""

from stages import Params, run


def download(params: Params) -> None:
    """Write the images as uint8 arrays, with labels, class names and a digest."""
    from cifarlab import files
    from cifarlab.data import layout
    from cifarlab.data.archives import readable
    from cifarlab.data.readers import prepare

    problems: list[layout.Problem] = []
    try:
        data = prepare(params.data, files.root(), files.cache(), files.DATA, problems)
    finally:  # also if too many cannot be read
        rows = [{k: readable(v) for k, v in problem._asdict().items()} for problem in problems]
        files.write_csv(files.PROBLEMS, rows, layout.Problem._fields)
    train, test = len(data.labels["train"]), len(data.labels["test"])
    parts = f"{train:,} to train, {test:,} to test"
    read = f"{data.name}: read {train + test:,} images of {len(data.classes)} classes ({parts})"
    print(read + layout.summary(problems))


if __name__ == "__main__":
    run(download)
