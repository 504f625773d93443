"""The interface of predictors, the baselines, and the interface of representations."""
