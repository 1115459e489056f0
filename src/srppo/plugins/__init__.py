"""The coherent reward inside other engines: trl in process, openrlhf and verl by the server."""
