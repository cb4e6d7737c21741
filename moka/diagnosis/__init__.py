"""The report of `moka diagnose`: samples read for any model, measured by `moka.analysis`, as figures, charts and a page."""
