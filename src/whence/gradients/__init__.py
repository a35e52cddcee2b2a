"""What vector an example becomes: its loss gradient by layer, exact or projected, and inner products of such vectors.

Data flows through the modules in this order:

    space           the settings that decide which vector an example becomes
    capture         per-example pairs (a, g) of every traced layer, from one ordinary backward pass
    norms           lengths of examples' gradients
    protocols       what a projection is
    projections/    linear maps from a layer's gradient to a few numbers, one file each
    adam            what Adam makes of an example's gradient
    exact           scores from unprojected gradients
    tokenwise       the same scores, shared out among query tokens and training tokens
    ghost           inner products with a fixed direction in weight space, without forming a gradient
    recorded_pass   the same from a training's own pass, for a direction that is known only afterwards
    hessian         a mean loss's gradient and its Hessian's product with a direction
    forward_passes  pooled states and losses of a corpus, without gradients

The package never updates a weight, and it never stores a vector; `indexing` does.
"""
