import copy
import pickle

import pytest
import torch

from nas_mnist.errors import NO_GPU_MEMORY, StudyError, explain, is_final


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_gpu_without_memory_is_one_line_that_advises_fewer_workers_and_is_tried_again(error):
    line = explain(error)
    assert line == NO_GPU_MEMORY and "fewer workers" in line and "\n" not in line
    assert not is_final(line)


@pytest.mark.parametrize("carried", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_error_names_the_settings_that_mend_it_beside_its_message_in_another_process_too(carried):
    error = carried(StudyError("the study is of another epoch: name another", "study_name", "epochs"))
    assert str(error) == "the study is of another epoch: name another"
    assert error.settings == ("study_name", "epochs") and StudyError("x").settings == ()
