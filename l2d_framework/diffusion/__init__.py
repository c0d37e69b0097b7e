"""The one equation: schedule, parametrization and backbone put together, solved, read out and learned."""
