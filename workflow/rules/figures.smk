# How a figure is declared as an output.


def figure(name, category="Figures"):
    """A figure as an output that the report shows with its caption."""
    labels = {"figure": name.replace("_", " ")}
    return report(f"results/figures/{name}.svg", caption=f"../report/{name}.rst", category=category, labels=labels)
