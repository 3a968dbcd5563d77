"""Train the network: data/ → models/, plots/history.csv, metrics/train.json."""

from pathlib import Path

from cifarlab import UserError
from cifarlab.params import Params
from stages import run


def train(params: Params) -> None:
    """Train on the training split and follow the epochs in history.csv and MLflow; a training that was killed continues."""
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    import torch

    from cifarlab import models, training
    from cifarlab.checkpoints import Checkpoint
    from cifarlab.datasets import Dataset, stratified_split
    from cifarlab.files import atomic, root, write_json
    from cifarlab.tracking import Mirror, training_key

    device = training.set_up(params.train)
    gpu = training.take_gpu(root() / ".cache", torch.cuda.device_count()) if device.type == "cuda" else None  # noqa: F841, held to the end
    data = Dataset.load(Path("data"))
    kept, held_out = stratified_split(data.labels["train"], params.data.validation)

    if len(kept) < 2:
        raise UserError(f"data.validation = {params.data.validation} leaves {len(kept)} images to train on, too few for a batch; lower it")

    def to_device(indices: npt.NDArray[np.int64]) -> training.Images:
        return training.Images(
            torch.from_numpy(data.images["train"][indices]).to(device), torch.from_numpy(data.labels["train"][indices]).to(device)
        )

    images, validation = to_device(kept), to_device(held_out) if len(held_out) else None
    network = models.Network(params.model, params.data.image_size, data.classes)
    network.measure(images.images)
    network.to(device)
    conditions = training.conditions(params.train, device)
    checkpoint = Checkpoint(training_key(params), conditions)
    alone = checkpoint.claim()
    print(f"{data.name}: {params.model.describe()}, {network.count_parameters():,} parameters, on {conditions['device']}", flush=True)

    def write(history: list[training.Epoch]) -> None:
        with atomic(Path("plots/history.csv")) as path:
            pd.DataFrame([epoch.row() for epoch in history]).to_csv(path, index=False, float_format="%.6f")

    with Mirror("train", params, conditions, adopt=alone) as mirror:

        def follow(history: list[training.Epoch]) -> None:
            write(history)
            mirror.epoch(history[-1].epoch)

        history = training.fit(network, params.train, images, validation, follow, checkpoint=checkpoint if alone else None)
        write(history)  # also where all epochs were trained before
        models.save(network, Path("models/network.safetensors"))
        write_json(
            Path("metrics/train.json"),
            {
                "parameters": network.count_parameters(),
                "images": len(kept),
                **{k: v for k, v in history[-1]._asdict().items() if k.endswith(("loss", "accuracy")) and v is not None},
            },
        )


if __name__ == "__main__":
    run(train)
