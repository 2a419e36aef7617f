"""JSON schemas of many kinds, made by chance."""


def random_schema(rng, depth=3):
    """A schema that some value meets."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["array", "object", "object", "anyOf", "tuple"] if depth else []
    kind = rng.choice(kinds) if depth < 3 else "object"
    if kind == "string":
        return {"type": "string", **rng.choice([{}, {"maxLength": 12}, {"minLength": 2, "maxLength": 5}, PATTERN])}
    if kind == "integer":
        return {"type": "integer", **rng.choice([{}, {"minimum": -5, "maximum": 300}, {"exclusiveMinimum": 0}])}
    if kind == "number":
        return {"type": "number", **rng.choice([{}, {"minimum": 0.5, "maximum": 9.25}])}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 7, None, True, "a b", {"x": 1}, [1, 2]], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["fixed", 42, None])}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
    if kind == "tuple":
        items = [random_schema(rng, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind != "object":
        return {"type": kind}
    names = rng.sample(["name", "age", "a b", "tags", "\u00fc", "kind", "next"], rng.randint(0, 4))
    properties = {name: random_schema(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


PATTERN = {"pattern": "^[A-Z][a-z]{1,4}$"}
