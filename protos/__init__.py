"""The messages on the wire: our own minimal .proto files and the modules generated from them (`make protos`)."""
