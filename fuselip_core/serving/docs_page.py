"""/docs: the OpenAPI document as a page that needs no external scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuselip_core.html import render


def render_docs(document: dict[str, Any]) -> str:
    """HTML with the document's operations and their bodies."""
    schemas = document["components"]["schemas"]
    operations = [
        {
            "method": method.upper(),
            "path": path,
            "title": operation.get("description", ""),
            "body": _body(operation, schemas),
            "kinds": list(operation.get("requestBody", {}).get("content", {})),
        }
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return render(Path(__file__).with_name("docs.html.j2"), info=document["info"], operations=operations)


def _body(operation: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, str]]:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    fields = schemas.get(schema.get("$ref", "").rpartition("/")[2], {})
    required = fields.get("required", [])
    return [
        {
            "name": name,
            "kind": _kind(field),
            "default": "required" if name in required else str(field.get("default", "")),
            "words": field.get("description", ""),
        }
        for name, field in fields.get("properties", {}).items()
    ]


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    return f"list of {_kind(field['items'])}" if "items" in field else str(field.get("type", "any"))
