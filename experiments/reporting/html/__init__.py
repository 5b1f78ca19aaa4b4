"""Training runs as one HTML file that needs nothing beside it.

    python -m experiments.report runs/a runs/b

`runs` reads the folders, `layers` looks into the networks, `charts` and `pictures` draw, `page`
puts it all together.
"""
