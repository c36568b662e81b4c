"""What is wrong with a file that does not match its schema, in words."""

from pydantic import ValidationError

from espnet_kv.errors import one_line


def first_error(error: ValidationError) -> str:
    """The first error, or that of the version, which is the cause of the others."""
    found = error.errors(include_url=False)
    first = next((one for one in found if one["loc"] == ("schema",)), found[0])
    key = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in first["loc"])[1:]
    if first["type"] == "missing":
        return f"{key} is missing"
    said = one_line(first["msg"]).replace("Input should be", "expected")
    if first["type"] == "json_invalid":
        return f"not a JSON file ({said})"
    return f"{key or 'profile'}: {said}, found {first['input']!r:.60}"
