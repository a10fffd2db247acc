"""MLflow reads this file as the model's code, so that our folder loads through `mlflow.pyfunc` without pickle."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class PropensityModel(PythonModel):
    """A saved model of ours; rows are a pandas frame with the contract's features."""

    def load_context(self, context: Any) -> None:
        """Load and verify the folder."""
        from propensity_dagster.models.saved import load_model

        self.model = load_model(Path(context.artifacts["saved_model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Calibrated probability of each row."""
        return self.model.predict_proba(pa.Table.from_pandas(model_input, preserve_index=False))


set_model(PropensityModel())
