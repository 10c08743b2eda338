"""What every section of the configuration has in common."""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _whole_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads 1e6 (no dot) as text; pydantic takes such text for a float, and here for an int."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, str) and annotation in (int, int | None) and re.fullmatch(r"\d+e\d+", value):
            return float(value)
        return value
