"""Features of whole cases by an encoder that is not trained further."""
