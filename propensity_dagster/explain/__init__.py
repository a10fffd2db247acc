"""Why a score: contributions, reason codes, importance, dependence. The one package that imports shap."""
