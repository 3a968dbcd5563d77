"""Look at the test set, once: models/, data/ → metrics/evaluate.json and the tables in plots/."""

from pathlib import Path

from cifarlab.params import Params
from stages import run


def evaluate(params: Params) -> None:
    """Write accuracy, F1, calibration, the confusion matrix and every prediction."""
    import torch

    from cifarlab import evaluation, models
    from cifarlab.augment import Draws, augment
    from cifarlab.checkpoints import Checkpoint
    from cifarlab.datasets import Dataset
    from cifarlab.files import atomic, write_json
    from cifarlab.tracking import Mirror, training_key

    # Only now has DVC what the training wrote: a kill between its end and DVC's own entry must not lose it.
    Checkpoint.remove(training_key(params))
    models.keep_memory()
    data = Dataset.load(Path("data"))
    network = models.load(Path("models/network.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Mirror("evaluate", params):
        images = torch.from_numpy(data.images["test"].copy()).to(device)
        logits = models.predict(network.to(device), images, params.evaluate.batch_size)
        probabilities = logits.double().softmax(1).cpu().numpy()
        metrics, tables = evaluation.evaluate(probabilities, data.labels["test"], data.classes, params.evaluate.calibration_bins)
        if params.evaluate.mirror:
            both = logits + models.predict(network, images.flip(2), params.evaluate.batch_size)
            metrics["accuracy_mirrored"] = float((both.argmax(1).cpu().numpy() == data.labels["test"]).mean())
        for pixels in range(1, params.evaluate.shifts + 1):
            shares = []
            for shift in ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
                draws = Draws(
                    torch.zeros(len(images), dtype=torch.bool, device=device), torch.tensor(shift, device=device).expand(len(images), 2)
                )
                moved = models.predict(network, augment(images, draws).permute(0, 2, 3, 1), params.evaluate.batch_size)
                shares.append((moved.argmax(1).cpu().numpy() == data.labels["test"]).mean())
            metrics[f"accuracy_shifted_{pixels}"] = float(sum(shares) / len(shares))
        write_json(Path("metrics/evaluate.json"), metrics)
        for name, table in tables.items():
            with atomic(Path(f"plots/{name}.csv")) as path:
                table.to_csv(path, index=False, float_format="%.6f")
        print(f"test accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f}, macro F1 {metrics['macro_f1']:.4f}")


if __name__ == "__main__":
    run(evaluate)
