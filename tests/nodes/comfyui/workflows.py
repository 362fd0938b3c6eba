"""Workflow files as the server runs them."""

import json

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def api_form(workflow, described):
    """A workflow as the browser saves it, in the form that the server runs."""
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in described:
            assert node["type"] in ("MarkdownNote", "Note"), f"unknown node {node['type']}"
            continue
        inputs, values = {}, list(node.get("widgets_values", []))
        fields = {
            name: spec for group in ("required", "optional") for name, spec in described[node["type"]]["input"].get(group, {}).items()
        }
        for name, spec in fields.items():
            options = spec[1] if len(spec) > 1 else {}
            if (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput"):
                if not values and name in described[node["type"]]["input"].get("optional", {}):
                    continue  # added since the graph was saved: the default
                assert values, f"{node['type']} has no value for {name}"
                inputs[name] = values.pop(0)
                if values and values[0] in ("fixed", "randomize", "increment", "decrement") and spec[0] == "INT":
                    values.pop(0)
        assert not values, f"{node['type']} has {len(values)} widget values too many: {values}"
        for socket_ in node.get("inputs", []):
            if socket_.get("link") is not None:
                inputs[socket_["name"]] = list(links[socket_["link"]])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def changed(prompt, kind, **inputs):
    """A copy of a prompt with some inputs of the nodes of one kind set."""
    copy = json.loads(json.dumps(prompt))
    for node in copy.values():
        if node["class_type"] == kind:
            node["inputs"].update(inputs)
    return copy
