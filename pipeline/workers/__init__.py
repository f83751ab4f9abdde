"""Workers in other processes: of this machine, of a Dask or a Ray cluster."""
