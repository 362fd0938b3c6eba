"""Subgraph blueprints against the nodes' schemas."""

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def _kind(spec):
    return spec[0] if isinstance(spec[0], str) else "COMBO"


def _options(spec):
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"] if "options" in (spec[1] if len(spec) > 1 else {}) else None


def _of_node(node, known):
    """What of one node is not as its schema says."""
    if node["type"] not in known:
        return [f"no node {node['type']}"]
    described = known[node["type"]].INPUT_TYPES()
    inputs = {name: spec for group in ("required", "optional") for name, spec in described.get(group, {}).items()}
    widgets = {n: s for n, s in inputs.items() if _kind(s) in WIDGETS and not (len(s) > 1 and s[1].get("forceInput"))}
    given, found = {one["name"]: one for one in node["inputs"]}, []
    found += [f"no input {name}" for name in given.keys() - inputs.keys()]
    found += [f"{n} is {one['type']}" for n, one in given.items() if n in inputs and one["type"] != _kind(inputs[n])]
    found += [f"{n} is not connected" for n in described["required"] if n not in widgets and given.get(n, {}).get("link") is None]
    if [name for name, one in given.items() if "widget" in one] != list(widgets):
        found.append(f"widgets are not in the order {list(widgets)}")
    values = [value for value in node["widgets_values"] if value != "fixed"]  # what the browser adds to seeds
    if len(values) != len(widgets):
        return [*found, f"{len(values)} values for {len(widgets)} widgets"]
    for value, (name, spec) in zip(values, widgets.items()):
        low, high = (spec[1].get(bound, value) if len(spec) > 1 else value for bound in ("min", "max"))
        if (options := _options(spec)) is not None and value not in options:
            found.append(f"{name} = {value} is not one of its choices")
        if _kind(spec) in ("INT", "FLOAT") and not low <= value <= high:
            found.append(f"{name} = {value} lies outside {low} … {high}")
    outputs = list(known[node["type"]].RETURN_TYPES)
    return found + ([] if [one["type"] for one in node["outputs"]] == outputs else [f"outputs are not {outputs}"])


def problems(blueprint, known):
    """What of a blueprint's nodes, links, inputs and outputs does not fit together; known: node classes by id."""
    (inner,), (outer,) = blueprint["definitions"]["subgraphs"], blueprint["nodes"]
    nodes = {node["id"]: node for node in inner["nodes"]}
    found = [f"{node['type']}: {problem}" for node in inner["nodes"] for problem in _of_node(node, known)]
    ends = {-10: {"outputs": inner["inputs"]}, -20: {"inputs": inner["outputs"]}, **nodes}
    for link in inner["links"]:
        source = ends[link["origin_id"]]["outputs"][link["origin_slot"]]
        target = ends[link["target_id"]]["inputs"][link["target_slot"]]
        if not source["type"] == target["type"] == link["type"]:
            found.append(f"link {link['id']}: {source['type']} to {target['type']}")
        if link["target_id"] in nodes and target["link"] != link["id"]:
            found.append(f"link {link['id']}: its target has link {target['link']}")
    drawn = {link["id"] for link in inner["links"]}
    named = {i for one in inner["inputs"] + inner["outputs"] for i in one["linkIds"]}
    named |= {one["link"] for node in inner["nodes"] for one in node["inputs"] if one["link"] is not None}
    found += [f"link {i} is drawn or named alone" for i in drawn ^ named]
    if outer["type"] != inner["id"] or outer["id"] in nodes:
        found.append("the node is not its subgraph's, or has the id of a node inside")
    for side in ("inputs", "outputs"):
        if [(one["name"], one["type"]) for one in outer[side]] != [(one["name"], one["type"]) for one in inner[side]]:
            found.append(f"{side} of the node are not those of its subgraph")
    return found
