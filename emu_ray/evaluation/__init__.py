"""Who is preferred and by how much: preference statistics and the report that shows them."""
