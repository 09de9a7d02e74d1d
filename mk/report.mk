# Reports are checked in a headless Chromium, the distribution's; see docs/report.md.
.PHONY: test-report
test-report: $(VENV)/.installed
	@chromium="$$(bash tests/report/setup_chromium.sh)" && OMP_NUM_THREADS=1 PLANC_CHROMIUM="$$chromium" \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/report
