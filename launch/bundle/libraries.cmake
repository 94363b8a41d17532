# Run by cmake --install: gives the programs of an installation every library that they need, so that the folder can be
# copied to other machines. Invariant: nothing in the folder needs a library outside it, except those of_the_machine.
# Expects source_dir, version, patchelf, mpirun and objdump.
set(prefix $ENV{DESTDIR}${CMAKE_INSTALL_PREFIX})
if(NOT patchelf)
  message(FATAL_ERROR "patchelf was not found when this build was configured, and an installation needs it: install "
                      "the Debian package patchelf and configure again")
endif()

# What belongs to the machine: glibc goes with its kernel and name services, CUDA with its driver, and the libraries of
# fast networks with their adapters (one of our own would also stand before the machine's in NCCL's search for it).
# libstdc++ and libgcc_s stay behind as well: a machine whose glibc is new enough has them as new, and what its own
# plugins want (NCCL's for its network, say) may be newer than ours.
set(of_the_machine
  "^ld-linux" "^lib(c|m|mvec|dl|rt|pthread|resolv|util|anl|nsl|stdc\\+\\+|gcc_s)\\.so"
  "^lib(cuda|cu[a-z]+|nccl|nv[a-z-]+)[A-Za-z]*\\.so"
  "^lib(ibverbs|rdmacm|efa|fabric|psm2|psm_infinipath|infinipath|uc[cmpst]|numa|nl-3|nl-route-3)\\.so")
# Open MPI as Debian lays it out below its prefix, so that OPAL_PREFIX alone tells it where everything is.
set(openmpi_lib lib/x86_64-linux-gnu/openmpi/lib)

# What bin/mpirun and launch/bootstrap tell Open MPI, PMIx and hwloc of where they have moved: variables, and paths from
# the prefix. (There are no plugins of hwloc; those of the machine may be of another version.)
file(WRITE ${prefix}/share/octet/environment
  "OPAL_PREFIX=\nPMIX_PKGLIBDIR=lib/pmix\nPMIX_PKGDATADIR=share/pmix\nHWLOC_PLUGINS_PATH=lib/hwloc\n")

# ---- Open MPI: its launcher, its plugins, its messages ---------------------------------------------------------------

file(REMOVE_RECURSE ${prefix}/lib ${prefix}/share/openmpi ${prefix}/share/pmix)
file(REAL_PATH ${mpirun} orterun)
cmake_path(GET orterun PARENT_PATH openmpi_bin)
cmake_path(GET openmpi_bin PARENT_PATH openmpi_prefix)
file(COPY_FILE ${orterun} ${prefix}/bin/orterun ONLY_IF_DIFFERENT)  # bin/mpirun is a script that starts this one
file(COPY ${openmpi_bin}/orted DESTINATION ${prefix}/bin)
file(COPY ${openmpi_prefix}/share/openmpi DESTINATION ${prefix}/share FILES_MATCHING PATTERN "help-*.txt")
# Neither OpenSHMEM nor what only Debian's other packages use.
file(GLOB plugins ${openmpi_prefix}/${openmpi_lib}/openmpi3/mca_*.so)
list(FILTER plugins EXCLUDE REGEX "/mca_(atomic|memheap|scoll|spml|sshmem)_|_monitoring\\.so|_netlink\\.so")
file(COPY ${plugins} DESTINATION ${prefix}/${openmpi_lib}/openmpi3)

# ---- Libraries -------------------------------------------------------------------------------------------------------

file(GLOB programs ${prefix}/bin/octet ${prefix}/bin/orterun ${prefix}/bin/orted)
file(GLOB_RECURSE checks ${prefix}/libexec/octet/*)
list(APPEND programs ${checks})
file(GLOB modules ${prefix}/bin/*.so ${prefix}/${openmpi_lib}/openmpi3/*.so)

# Copies what `files` need to lib/, each library under the name by which it is asked for.
function(bring_libraries_of)
  file(GET_RUNTIME_DEPENDENCIES EXECUTABLES ${programs} MODULES ${ARGN}
    RESOLVED_DEPENDENCIES_VAR libraries CONFLICTING_DEPENDENCIES_PREFIX several
    PRE_EXCLUDE_REGEXES ${of_the_machine} POST_EXCLUDE_REGEXES "^${prefix}/")
  foreach(name IN LISTS several_FILENAMES)
    list(GET several_${name} 0 first)
    list(APPEND libraries ${first})
  endforeach()
  file(MAKE_DIRECTORY ${prefix}/lib)
  foreach(library IN LISTS libraries)
    cmake_path(GET library FILENAME name)
    file(REAL_PATH ${library} real)
    file(COPY_FILE ${real} ${prefix}/lib/${name})
  endforeach()
endfunction()
bring_libraries_of(${modules})
# PMIx, over which srun and mpirun meet their ranks, has plugins of its own.
file(GLOB pmix ${openmpi_prefix}/lib/*/pmix2)
file(GLOB pmix_plugins ${pmix}/lib/pmix/*.so)
file(COPY ${pmix_plugins} DESTINATION ${prefix}/lib/pmix)
file(COPY ${pmix}/share/pmix DESTINATION ${prefix}/share FILES_MATCHING PATTERN "help-*.txt")
bring_libraries_of(${pmix_plugins})

# ---- Who looks where -------------------------------------------------------------------------------------------------

# As RPATH, which goes before LD_LIBRARY_PATH: the Open MPI of a cluster's modules must not be mixed with ours.
file(GLOB_RECURSE libraries ${prefix}/lib/*.so*)
file(GLOB installed_modules ${prefix}/bin/*.so)
set(needs_glibc 2.0)
foreach(file IN LISTS programs libraries installed_modules)
  cmake_path(GET file PARENT_PATH folder)
  file(RELATIVE_PATH to_libraries ${folder} ${prefix}/lib)
  execute_process(COMMAND ${patchelf} --force-rpath --set-rpath $ORIGIN/${to_libraries} ${file}
    COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${objdump} -p ${file} OUTPUT_VARIABLE headers COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "GLIBC_2\\.[0-9]+" versions "${headers}")
  foreach(needed IN LISTS versions)
    string(REPLACE GLIBC_ "" needed ${needed})
    if(needed VERSION_GREATER needs_glibc)
      set(needs_glibc ${needed})
    endif()
  endforeach()
endforeach()

# ---- What this is ----------------------------------------------------------------------------------------------------

execute_process(COMMAND git describe --always --dirty --abbrev=12 WORKING_DIRECTORY ${source_dir}
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(commit unknown)
endif()
file(WRITE ${prefix}/share/octet/bundle.json
  "{\"version\": \"${version}\", \"commit\": \"${commit}\", \"needs_glibc\": \"${needs_glibc}\"}\n")
message(STATUS "Octet ${version} (${commit}) for machines with glibc ${needs_glibc} or newer: ${prefix}")
