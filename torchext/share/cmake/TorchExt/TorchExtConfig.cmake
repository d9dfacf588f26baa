# find_package(TorchExt) gives
#
#   TorchExt::torchext   the headers, the native libraries (loaded when the program starts), LibTorch
#   TorchExt_DIGITS      the folder of the embedded digits
#
# torchext.cmake_prefix_path() and torch.utils.cmake_prefix_path say where to look:
#
#   cmake -DCMAKE_PREFIX_PATH="$(python -c 'import torch, torchext
#   print(torchext.cmake_prefix_path(), torch.utils.cmake_prefix_path, sep=";")')" ...
if(TARGET TorchExt::torchext)
  return()
endif()

get_filename_component(_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(TorchExt_DIGITS "${_package}/data/digits")
# In a source tree the headers stand outside the package.
find_path(TorchExt_INCLUDE_DIR torchext/torchext.h
          PATHS "${_package}/include" "${_package}/../csrc/include" NO_DEFAULT_PATH NO_CACHE)
find_file(TorchExt_LIBRARY _C.abi3.so PATHS "${_package}" NO_DEFAULT_PATH NO_CACHE)

# Not TorchConfig.cmake: where torch is built with CUDA that asks for a CUDA toolkit, which nothing
# here needs. A project that has found Torch before uses what it found.
if(TARGET torch)
  set(TorchExt_TORCH torch)
else()
  find_path(TorchExt_TORCH include/torch/csrc/api/include/torch/torch.h
            HINTS "${Torch_DIR}" ${CMAKE_PREFIX_PATH} "${_package}/../torch/share/cmake"
            PATH_SUFFIXES ../.. NO_DEFAULT_PATH NO_CACHE)
  get_filename_component(TorchExt_TORCH "${TorchExt_TORCH}" ABSOLUTE)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchExt
  REQUIRED_VARS TorchExt_LIBRARY TorchExt_INCLUDE_DIR TorchExt_TORCH
  REASON_FAILURE_MESSAGE "CMAKE_PREFIX_PATH must hold torchext.cmake_prefix_path() and \
torch.utils.cmake_prefix_path, and torchext must be built")
if(NOT TorchExt_FOUND)
  return()
endif()

add_library(TorchExt::torchext INTERFACE IMPORTED)
target_include_directories(TorchExt::torchext INTERFACE "${TorchExt_INCLUDE_DIR}")
target_compile_features(TorchExt::torchext INTERFACE cxx_std_20)

# The program refers to nothing in the libraries of registrations, so the linker would drop them.
function(_torchext_link_all library)
  target_link_libraries(TorchExt::torchext
                        INTERFACE "-Wl,--push-state,--no-as-needed,${library},--pop-state")
endfunction()

_torchext_link_all("${TorchExt_LIBRARY}")
if(TARGET torch)
  target_link_libraries(TorchExt::torchext INTERFACE ${TORCH_LIBRARIES})
else()
  target_include_directories(
    TorchExt::torchext SYSTEM INTERFACE "${TorchExt_TORCH}/include"
                                        "${TorchExt_TORCH}/include/torch/csrc/api/include")
  foreach(_name torch_cpu c10 torch_cuda c10_cuda torch)
    find_library(_library ${_name} PATHS "${TorchExt_TORCH}/lib" NO_DEFAULT_PATH NO_CACHE)
    if(_library)
      _torchext_link_all("${_library}")
    endif()
    unset(_library)
  endforeach()
  target_link_options(TorchExt::torchext INTERFACE "-Wl,-rpath,${TorchExt_TORCH}/lib")
endif()
# The CUDA kernels, only where torch has CUDA.
find_file(_cuda _C_cuda.abi3.so PATHS "${_package}" NO_DEFAULT_PATH NO_CACHE)
if(_cuda AND (TARGET torch_cuda OR EXISTS "${TorchExt_TORCH}/lib/libtorch_cuda.so"))
  _torchext_link_all("${_cuda}")
endif()
unset(_cuda)
