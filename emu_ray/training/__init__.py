"""One train function for every network of the project; what differs is a task (the loss) and examples (the data). Ray only in on_ray.py."""
