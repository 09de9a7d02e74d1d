# The accuracy report. PLANC_DATA names the measured data; PLANC_TABLES the operator tables (or install the
# extra `measured`); AICONFIGURATOR_PYTHON an environment with aiconfigurator==0.12.0. `make accuracy-report`
# writes the page anew from the results that lie in out/accuracy.
.PHONY: accuracy accuracy-report

accuracy: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python docs/accuracy.py --run

accuracy-report: $(VENV)/.installed
	@$(BIN)/python docs/accuracy.py
