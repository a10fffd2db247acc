"""The OpenAPI document, made from what is served now: fields, ranges, examples, every error."""

from typing import Any

import msgspec

from propensity_dagster.serving.inputs import KEY_PATTERN, MAX_ROWS, MAX_TEXT, Inputs
from propensity_dagster.serving.packages import Release
from propensity_dagster.serving.watch import State

Json = dict[str, Any]

PAGE = b"""<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="UTF-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <meta http-equiv="Content-Security-Policy"
          content="default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'">
    <title>Propensity</title>
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="./static_content/swagger-ui.css">
  </head>
  <body>
    <div id="swagger-ui"></div>
    <script src="./static_content/swagger-ui-bundle.js"></script>
    <script src="./static_content/swagger-ui-standalone-preset.js"></script>
    <script src="./static_content/swagger-initializer.js"></script>
  </body>
</html>
"""

_ERRORS = {
    400: "the connection ended before the body did",
    401: "an API key is needed, or is not known",
    404: "there is no such path or campaign",
    405: "another method is allowed",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not application/json",
    422: "the body is not JSON, or fields are wrong; each is named",
    429: "too many requests of this key, or at once",
    500: "an error of the server",
    503: "no champion, no online store, or too late",
}
_READING = (401, 404, 405, 429, 500, 503)
_WRITING = (400, 401, 404, 405, 408, 413, 415, 422, 429, 500, 503)
_EXAMPLE_FEATURES = 7


def document(state: State) -> bytes:
    """The document of the service: plain paths for the default campaign, and every campaign's own."""
    default = state.releases.get(state.default_campaign or "")
    paths: Json = {}
    schemas: Json = {"Problem": _PROBLEM}
    if default is not None:
        paths |= _campaign_paths("", default)
    for name, release in sorted(state.releases.items()):
        schemas |= _campaign_schemas(release)
        paths |= _campaign_paths(f"/campaigns/{name}", release)
    paths["/campaigns"] = {"get": _reading("campaigns", "The campaigns that are served", _OBJECT, "service")}
    paths["/livez"] = {"get": _open("livez", "Whether the process is alive", _STATUS)}
    paths["/readyz"] = {"get": _open("readyz", "Whether there is a champion to answer with", _STATUS)}
    metrics = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": _reading("metrics", "Prometheus metrics", None, "service", content=metrics)}
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Propensity",
                "version": "1",
                "description": "Calibrated conversion scores of the champion, one at a time.",
            },
            "paths": paths,
            "security": [{"ApiKey": []}, {"Bearer": []}] if state.keys.entries else [],
            "components": {
                "schemas": schemas,
                "securitySchemes": {
                    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                    "Bearer": {"type": "http", "scheme": "bearer"},
                },
                "headers": {
                    "RequestId": {"schema": {"type": "string"}, "description": "as sent in X-Request-ID, or a new one"}
                },
            },
        }
    )


_OBJECT: Json = {"type": "object"}
_STATUS: Json = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_PROBLEM: Json = {
    "type": "object",
    "required": ["status", "code", "message", "fields", "request_id"],
    "additionalProperties": False,
    "properties": {
        "status": {"type": "integer"},
        "code": _TEXT,
        "message": _TEXT,
        "fields": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": _TEXT, "message": _TEXT},
            },
        },
        "request_id": _TEXT,
    },
    "examples": [
        {
            "status": 422,
            "code": "invalid_fields",
            "message": "a field is wrong",
            "fields": [{"field": "age", "message": "must be between 0 and 120"}],
            "request_id": "5f0c2a7d91be00000007",
        }
    ],
}


def _campaign_paths(prefix: str, release: Release) -> Json:
    name = release.campaign
    tag = "default campaign" if not prefix else name
    row, rows = {"$ref": f"#/components/schemas/{name}.row"}, {"$ref": f"#/components/schemas/{name}.rows"}
    answer = {"$ref": f"#/components/schemas/{name}.answer"}
    answers: Json = {
        "type": "object",
        "required": ["predictions", "request_id"],
        "properties": {"predictions": {"type": "array", "items": answer}, "request_id": _TEXT},
    }
    explained = {"$ref": f"#/components/schemas/{name}.explained"}
    example = _example(release.inputs)
    return {
        f"{prefix}/predict": {"post": _writing(f"{tag}_predict", "Score one customer", row, example, answer, tag)},
        f"{prefix}/predict_batch": {
            "post": _writing(
                f"{tag}_predict_batch", f"Score up to {MAX_ROWS:,} customers", rows, {"rows": [example]}, answers, tag
            )
        },
        f"{prefix}/explain": {
            "post": _writing(f"{tag}_explain", "Score one customer and say why", row, example, explained, tag)
        },
        f"{prefix}/model": {"get": _reading(f"{tag}_model", "The model that answers", _OBJECT, tag)},
    }


def _campaign_schemas(release: Release) -> Json:
    name, inputs = release.campaign, release.inputs
    answer = _answer_schema(inputs)
    explained: Json = {
        **answer,
        "required": [*answer["required"], "base", "base_probability", "log_odds", "reasons", "others"],
        "properties": {
            **answer["properties"],
            "base": _described(_NUMBER, "log-odds of the reference population"),
            "base_probability": _described(_NUMBER, "the same as a probability"),
            "log_odds": _described(_NUMBER, "base + contributions of the reasons + others"),
            "others": _described(_NUMBER, "what all other features contribute"),
            "reasons": {"type": "array", "items": _REASON},
        },
    }
    rows: Json = {
        "type": "object",
        "required": ["rows"],
        "additionalProperties": False,
        "properties": {
            "rows": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_ROWS,
                "items": {"$ref": f"#/components/schemas/{name}.row"},
            }
        },
    }
    return {
        f"{name}.row": _row_schema(inputs),
        f"{name}.rows": rows,
        f"{name}.answer": answer,
        f"{name}.explained": explained,
    }


def _row_schema(inputs: Inputs) -> Json:
    properties: Json = {}
    if inputs.key is not None:
        properties[inputs.key] = {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_TEXT,
            "pattern": KEY_PATTERN,
            "description": "the customer's id; features that the body lacks come from its newest snapshot",
        }
    for field in inputs.fields:
        window = f" (window: {field.window} days)" if field.window not in ("", "all") else ""
        if field.kind == "category":
            known = ", ".join(field.categories[:20]) + (" ..." if len(field.categories) > 20 else "")
            limits: Json = {"type": ["string", "null"], "maxLength": MAX_TEXT}
            words = f"{field.meaning}{window}; known are {known}; another counts as missing and is flagged"
        else:
            limits = {"type": ["number", "null"], "minimum": field.minimum, "maximum": field.maximum}
            words = f"{field.meaning}{window}"
        example = [] if field.typical is None else [field.typical]
        properties[field.name] = {**limits, "description": words, "examples": example}
    return {
        "type": "object",
        "required": [inputs.key] if inputs.key is not None else [],
        "additionalProperties": False,
        "properties": properties,
    }


def _answer_schema(inputs: Inputs) -> Json:
    names = {"type": "array", "items": _TEXT}
    unit: Json = {"type": "number", "minimum": 0, "maximum": 1}
    properties: Json = {
        "campaign": _TEXT,
        "probability": _described(unit, "calibrated probability of a conversion"),
        "percentile": _described(unit, "share of the last scored population at or below"),
        "decile": {"type": "integer", "minimum": 1, "maximum": 10, "description": "1 is the top tenth"},
        "tier": {"enum": ["high", "medium", "low"], "description": "by percentile"},
        "expected_value": _described(_NUMBER, "probability x margin - cost of one contact"),
        "decision": {"enum": ["contact", "skip"], "description": "contact above the threshold"},
        "threshold": {"type": ["number", "null"], "description": "break-even probability: cost over margin"},
        "model_version": _TEXT,
        "variant": {"enum": ["champion", "challenger"], "description": "who answered"},
        "known": {"type": ["boolean", "null"], "description": "whether the store knows the customer; null: not asked"},
        "features_missing": {**names, "description": "features with a value from neither side"},
        "features_unseen": {**names, "description": "categories that training never saw; they count as missing"},
        "features_from": {
            "type": "object",
            "required": ["request", "online"],
            "properties": {"request": names, "online": names},
        },
        "online": {
            "type": ["object", "null"],
            "properties": {"snapshot": _TEXT, "published_at": _TEXT, "age_hours": _NUMBER},
            "description": "the snapshot of the features that the body lacked, and its age",
        },
        "request_id": _TEXT,
    }
    if inputs.key is not None:
        properties = {inputs.key: _TEXT, **properties}
    return {"type": "object", "required": list(properties), "additionalProperties": True, "properties": properties}


_REASON: Json = {
    "type": "object",
    "required": ["feature", "value", "typical", "contribution", "direction", "sentence"],
    "properties": {
        "feature": _TEXT,
        "value": {"type": ["number", "string", "null"]},
        "typical": {"type": ["number", "string", "null"], "description": "median or mode of the reference population"},
        "contribution": {"type": "number", "description": "log-odds"},
        "direction": {"enum": ["raises", "lowers"]},
        "sentence": _TEXT,
    },
}


def _example(inputs: Inputs) -> Json:
    """A body with the features that the outside has names of its own for, else the first ones."""
    named = [f for f in inputs.fields if f.name != f.feature] or list(inputs.fields[:_EXAMPLE_FEATURES])
    shown = {f.name: f.typical for f in named if f.typical is not None}
    return {**({inputs.key: "12345"} if inputs.key is not None else {}), **shown}


def _described(schema: Json, words: str) -> Json:
    return {**schema, "description": words}


def _writing(operation: str, summary: str, row: Json, example: Json, answer: Json, tag: str) -> Json:
    return {
        "operationId": operation.replace(" ", "_"),
        "summary": summary,
        "tags": [tag],
        "requestBody": {"required": True, "content": {"application/json": {"schema": row, "example": example}}},
        "responses": {"200": _answered("the answer", {"application/json": {"schema": answer}}), **_problems(_WRITING)},
    }


def _reading(operation: str, summary: str, answer: Json | None, tag: str, content: Json | None = None) -> Json:
    stated = content or {"application/json": {"schema": answer}}
    return {
        "operationId": operation.replace(" ", "_"),
        "summary": summary,
        "tags": [tag],
        "responses": {"200": _answered("the answer", stated), **_problems(_READING)},
    }


def _open(operation: str, summary: str, answer: Json) -> Json:
    return {**_reading(operation, summary, answer, "service"), "security": []}


def _answered(words: str, content: Json) -> Json:
    return {
        "description": words,
        "headers": {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}},
        "content": content,
    }


def _problems(statuses: tuple[int, ...]) -> Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): _answered(_ERRORS[status], content) for status in statuses}
