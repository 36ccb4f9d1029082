"""Records: frozen data with a JSON form. What stands in a string under a field is its description in the JSON Schema."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Record(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # pydantic's own way reads the source of every class at import; this reads it only when a schema is asked for.
        for field in cls.model_fields.values():
            if isinstance(field.default, Record):
                type(field.default).model_rebuild()  # to be written into the schema; pydantic before 2.13 does not do that itself
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        docs = field_docs(cls)
        for name, field in cls.model_fields.items():
            key = field.alias or name
            if key in properties and name in docs:
                properties[key].setdefault("description", docs[name])
        return schema


def field_docs(kind: type) -> dict[str, str]:
    """The string under each annotated field of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time, or no source beside the bytecode
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, after in pairwise(body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = inspect.cleandoc(text)
    return docs
