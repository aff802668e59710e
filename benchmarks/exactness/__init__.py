"""Does one optimizer step depend on how its batch is split? One table, for us and for others."""
