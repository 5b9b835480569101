"""Work of many calls through one model, a step at a time, fair among tenants. Knows neither texts nor tables."""
