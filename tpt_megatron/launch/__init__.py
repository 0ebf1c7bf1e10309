"""Before a cluster is touched, and on to it: what a run will take, and how it is started."""
