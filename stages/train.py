"""Train the network: data/ → models/, plots/history.csv, metrics/train.json."""

from stages import Params, interrupted_once, processes, run


def train(params: Params) -> None:
    """Train in this process, or start as many as train.processes."""
    if params.train.processes > 1 and not processes.started():
        processes.launch(params.train.processes)
    else:
        train_here(params)


def train_here(params: Params) -> None:
    """Train, and write history.csv after every epoch. A training that was killed resumes."""
    from cifarlab.tracking.logger import Logger

    logger = Logger("train", params) if processes.is_first() else None
    import torch

    from cifarlab import files, pipeline
    from cifarlab.data.dataset import Dataset
    from cifarlab.nn import weights
    from cifarlab.runtime import checkpoints, device, timings
    from cifarlab.training import loop
    from cifarlab.training.ranks import Ranks

    there = device.set_up(params.train)
    if there.type == "cuda":
        lock = device.take_gpu(files.cache(), torch.cuda.device_count())  # noqa: F841, held to the end
    ranks = Ranks.join(there)
    data = Dataset.load(files.DATA)
    # The training itself needs memory, too.
    stream = data.images["train"].nbytes > device.free_memory(there, ranks.size) / 2
    network, images, validation = loop.prepare(params, data, there, stream=stream)
    dtype = device.precision(params.train, there)
    if not logger:  # the first process writes, logs and validates
        loop.fit(network, params.train, images, dtype=dtype, ranks=ranks)
        return
    key, conditions = pipeline.training_key(params), device.conditions(params.train, there)
    checkpoint = checkpoints.Checkpoint(key, conditions)
    kept = checkpoint if checkpoint.claim() else None
    size, variant = network.count_parameters(), params.model.describe()
    place = conditions["device"] + "; images that do not fit into memory stay on disk" * stream
    place += "; no image is held out" * (validation is None and params.data.validation > 0)
    print(f"{data.name}: {variant}, {size:,} parameters, on {place}", flush=True)
    with logger.run(conditions), interrupted_once():
        progress = timings.Progress(key, conditions, params.train.epochs)

        def on_epoch(history: list[loop.Row]) -> None:
            progress.epoch(history[-1])  # first: the logger reads both at any time
            files.write_csv(files.HISTORY, history)
            logger.log_epochs()

        inputs, see = (network, params.train, images, validation, on_epoch), progress.batch
        history = loop.fit(*inputs, on_batch=see, dtype=dtype, checkpoint=kept, ranks=ranks)
        files.write_csv(files.HISTORY, history)  # also if the checkpoint had all epochs
        weights.save(network, files.WEIGHTS)
        counts = {"parameters": size, "training_images": len(images.labels)}
        known = {k: v for k, v in history[-1].items() if v is not None}
        last = {k: v for k, v in known.items() if k.endswith(("loss", "accuracy"))}
        files.write_json(files.TRAIN_METRICS, counts | last)


if __name__ == "__main__":
    run(train)
