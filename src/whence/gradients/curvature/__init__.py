"""The curvature of a model's loss, layer by layer: K-FAC's factors, EK-FAC's eigenvalues, and the damped inverse.

    fisher     passes in which the model answers itself: what the curvature is measured from
    factors    covariances of a layer's inputs and of its slopes (K-FAC)
    eigen      their eigenbases, the eigenvalues in them (EK-FAC), and products with powers of the damped curvature

A query's gradient is multiplied by the inverse; the rows' gradients stay as they are, so that a plain index serves
every kind of curvature.
"""
