"""The code of a logged model. MLflow copies this file into the model: it imports nothing of ours.

Raw images in, names of classes and their probabilities out.
"""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

BATCH = 100


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Resizes images as in training and classifies them."""

    def load_context(self, context: Any) -> None:
        """Load the network, an exported graph without pickle. It is in evaluation mode."""
        self.network = torch.export.load(context.artifacts["network"]).module()

    # MLflow knows this plain type, and warns of others and of none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:
        """Return a row for each image.

        Parameters
        ----------
        model_input : uint8 (N, height, width, 3), RGB, of any height and width

        Returns
        -------
        The columns class, probability (of this class), and probability/<class> for every class.
        """
        classes, size = (context.model_config[name] for name in ("classes", "image_size"))
        images = np.asarray(model_input, np.uint8)
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be (N, height, width, 3), not {images.shape}")
        # An image that has the size already stays as it is.
        squares = [ImageOps.fit(Image.fromarray(image), (size, size)) for image in images]
        pixels = torch.from_numpy(np.array(squares, np.uint8).reshape(-1, size, size, 3))
        with torch.no_grad():
            batches = torch.split(pixels.permute(0, 3, 1, 2), BATCH)
            logits = torch.cat([self.network(batch.contiguous()) for batch in batches])
        found = logits.double().softmax(1).numpy()
        table = pd.DataFrame(found, columns=[f"probability/{name}" for name in classes])
        table.insert(0, "class", [classes[number] for number in found.argmax(1)])
        table.insert(1, "probability", found.max(1))
        return table


mlflow.models.set_model(ImageClassifier())
