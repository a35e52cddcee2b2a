"""Linear maps from a layer's gradient to a few numbers; one file each, listed in `catalogue.PROJECTIONS`."""
