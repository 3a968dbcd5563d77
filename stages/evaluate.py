"""Use the test images, once: models/, data/ → metrics/*.json and tables in plots/."""

from stages import Params, interrupted_once, run


def evaluate(params: Params) -> None:
    """Write accuracy, F1, calibration, the confusion matrix and every prediction."""
    from cifarlab.tracking.logger import Logger

    logger = Logger("evaluate", params)
    import numpy as np
    import torch

    from cifarlab import files, pipeline
    from cifarlab.data.dataset import Dataset
    from cifarlab.data.mapped import Mapped
    from cifarlab.evaluation import metrics
    from cifarlab.nn import network, weights
    from cifarlab.runtime import checkpoints, device

    # Not in the train stage: if that is killed at its very end, DVC has not stored its outputs yet.
    # `dvc repro -s evaluate` may come between: an interrupted training keeps its checkpoint.
    if not files.DVC_LOCK.exists() or pipeline.ran_as_asked(["train"]):
        checkpoints.path_of(pipeline.training_key(params)).unlink(missing_ok=True)
    device.keep_memory()
    data = Dataset.load(files.DATA)
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant
    on_gpu = torch.cuda.is_available() and params.train.device != "cpu"
    gpu_or_cpu = torch.device("cuda" if on_gpu else "cpu")
    trained = weights.load(files.WEIGHTS).to(gpu_or_cpu)
    with logger.run(), interrupted_once():
        pixels = data.images["test"]
        images = Mapped(pixels, np.arange(len(pixels)), gpu_or_cpu)
        labels = torch.from_numpy(data.labels["test"]).to(gpu_or_cpu)
        logits = network.predict(trained, images, params.evaluate.batch_size)
        probabilities = logits.double().softmax(1).cpu().numpy()
        truth, bins = data.labels["test"], params.evaluate.calibration_bins
        found, tables = metrics.evaluate(probabilities, truth, data.classes, bins)
        found |= metrics.accuracies_of_views(trained, images, labels, logits, params.evaluate)
        files.write_json(files.EVALUATION, found)
        # In a file of their own, because DVC shows every metric as a column.
        of_classes = {row["class"]: row["accuracy"] for row in tables["per_class"]}
        files.write_json(files.EVALUATION.with_name("per_class.json"), of_classes)
        for path in (files.PREDICTIONS, files.PER_CLASS, files.CONFUSION):
            files.write_csv(path, tables[path.stem])
        if params.tracking.log_model:
            logger.log_model(trained.cpu())
    print("test accuracy {accuracy:.2%}, loss {loss:.4f}, macro F1 {macro_f1:.4f}".format(**found))


if __name__ == "__main__":
    run(evaluate)
