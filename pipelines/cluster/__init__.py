"""Starting Ray on this machine or joining a cluster."""
