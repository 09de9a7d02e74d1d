# Engines run in an environment of their own (a CPU build of vLLM, about 3.5 GB); see docs/engines.md.
test-engines: $(VENV)/.installed
	@bash tests/engines/setup_vllm.sh
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines -p no:cacheprovider --durations=10 tests/engines
