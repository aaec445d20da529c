"""From a list of URLs to the pool: what others serve on the web, fetched with care for them and for ourselves."""
