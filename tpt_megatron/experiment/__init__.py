"""Arms of one experiment, trained so that they can be compared: what each run is, and the commands in order."""
