"""From the user's files to the `pool` station: readers of three layouts, and the one file that runs them on Ray."""
