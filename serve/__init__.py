"""The tuned model over HTTP: Ray Serve deployments, requests and answers, the page. Ray's own is `ray.serve`."""
